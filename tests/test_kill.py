"""A run that is killed, or whose disk is full, loses no finished step."""
import json
import resource

import kill
import pytest
import torch
from processes import tiny_folder, write_records
from safetensors.torch import load_file

import mine_hard
import train_sft


def test_five_kills_change_nothing(capsys):
    kill.main(["--kills", "5", "--seed", "1"])
    assert "5 kills" in capsys.readouterr().out


def sft(folder):
    """The arguments that the runs below share; an epoch is two steps."""
    return ["--model", str(tiny_folder(folder / "model")), "--data", str(write_records(folder / "records.jsonl")),
            "--batch-size", "6", "--device", "cpu"]


class Full:
    """A disk on which no file can grow beyond `size` bytes, until mended."""

    def __init__(self, size):
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.old[1]))

    def mend(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


@pytest.mark.parametrize("size, what", [(50_000, "step-000004.tmp/model.safetensors"), (8, "metrics.jsonl")])
def test_a_full_disk_leaves_the_checkpoint_before_it_usable(tmp_path, monkeypatch, size, what):
    arguments = [*sft(tmp_path), "--lr", "1e-2", "--epochs", "3", "--save-every", "2", "--dtype", "float32", "--out"]
    train_sft.main([*arguments, str(tmp_path / "whole")])
    update, disks = train_sft.update, []

    def fill_in_fourth(*args, count=[0]):
        count[0] += 1
        if count[0] == 4:
            disks.append(Full(size))
        return update(*args)

    monkeypatch.setattr(train_sft, "update", fill_in_fourth)
    out = tmp_path / "full"
    try:
        with pytest.raises(SystemExit) as error:
            train_sft.main([*arguments, str(out)])
    finally:
        disks[0].mend()
    assert f"{out / what}: cannot write: " in str(error.value) and "File too large" in str(error.value)
    assert [p.name for p in train_sft.checkpoints(out)] == ["step-000002"]
    assert not (out / "model.safetensors").exists()
    train_sft.main([*arguments, str(out), "--resume"])
    want, got = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000002", "step-000004"]
    assert not list(out.rglob("*.tmp"))


def test_a_full_disk_while_mining_costs_the_unwritten_block_only(tmp_path):
    data = write_records(tmp_path / "records.jsonl", 4)
    arguments = ["--model", str(tiny_folder(tmp_path / "model")), "--data", str(data), "--block", "2",
                 "--max-new-tokens", "30", "--dtype", "float32", "--device", "cpu", "--resume", "--out"]
    mine_hard.main([*arguments, str(tmp_path / "whole")])
    disk = Full(600)                                                               # the settings fit, answers do not
    try:
        with pytest.raises(SystemExit, match="00000000.jsonl: cannot write: File too large"):
            mine_hard.main([*arguments, str(tmp_path / "full")])
    finally:
        disk.mend()
    mine_hard.main([*arguments, str(tmp_path / "full")])
    whole, full = (tmp_path / name / "samples.jsonl" for name in ("whole", "full"))
    assert whole.read_bytes() == full.read_bytes()


def test_only_the_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    train_sft.main([*sft(tmp_path), "--epochs", "4", "--save-every", "1", "--keep", "3", "--out", str(tmp_path / "a")])
    assert sorted(p.name for p in (tmp_path / "a").glob("step-*")) == ["step-000005", "step-000006", "step-000007"]
    assert json.loads((tmp_path / "a/step-000007/state.json").read_text()) == {"step": 7}
    monkeypatch.setattr(train_sft.shutil, "rmtree", lambda *_, **__: None)         # killed while an old one was removed:
    train_sft.main([*sft(tmp_path), "--epochs", "2", "--save-every", "1", "--keep", "1", "--out", str(tmp_path / "b")])
    assert sorted(p.name for p in (tmp_path / "b").glob("step-*")) == ["step-000001.tmp", "step-000002.tmp", "step-000003"]
