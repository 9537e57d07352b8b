"""Sentences of movie reviews with their sentiment, from the source archive of vaderSentiment 0.5 (MIT).

10,605 snippets of Rotten Tomatoes (Pang & Lee 2004), each rated from -4 to 4 by twenty people (Hutto & Gilbert 2014).
"""

import io
import tarfile
import zipfile
from pathlib import Path

from experiments.data.texts import Labelled, Texts, once
from experiments.evidence import MissingData

ARCHIVE = "vaderSentiment-0.5.zip"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class MovieReviews(Texts):
    """Positive or negative by the sign of the mean rating: 2000 for the test, 1000 for validation, 7566 for training.

    Snippets whose ratings cancel out are left out.
    """

    counts, classes = {"val": 1000, "test": 2000}, 2

    @staticmethod
    def read(packages: Path) -> Labelled:
        """Snippets, and 1 where the mean rating is positive."""
        path = packages / ARCHIVE
        if not path.exists():
            command = f"pip download --no-deps --no-binary :all: -d {packages} vaderSentiment==0.5"
            raise MissingData(f"The archive {ARCHIVE} is not in {packages}: it", command)
        with zipfile.ZipFile(path) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
            content = inner.extractfile(FILE).read().decode()  # type: ignore[union-attr]
        rows = [line.split("\t") for line in content.splitlines()]
        rated = [(text.strip(), float(rating)) for _, rating, text in rows if float(rating)]
        return once([text for text, _ in rated], [int(rating > 0) for _, rating in rated])
