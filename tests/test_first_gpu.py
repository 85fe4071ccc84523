"""tools/first_gpu.py, rehearsed without a GPU: all its stages run, and it goes on as it says."""
import json
from pathlib import Path

import first_gpu
import pytest
from processes import CAN_SHARD


def arguments(out, *more):
    return ["--out", str(out), "--device", "cpu", *more]


@pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard a model on a CPU")
def test_all_stages_run_and_a_second_call_has_nothing_to_do(tmp_path, capsys, monkeypatch):
    results = first_gpu.main(arguments(tmp_path))
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    logs = "".join((tmp_path / f"{name}.log").read_text() for name in failed)
    assert not failed, f"{failed}\n{logs}"
    assert list(results) == list(first_gpu.STAGES)
    summary = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in summary] == list(results)       # one line each

    def unwanted(*_):
        raise AssertionError("a stage ran again")

    monkeypatch.setattr(first_gpu, "run_stage", unwanted)
    assert first_gpu.main(arguments(tmp_path)) == results


def simulate(monkeypatch, fails):
    """Stages that take no time; returns the list of (stage, kernels) that will be run."""
    ran = []

    def run_stage(args, name, kernels, seconds):
        ran.append((name, kernels))
        result = {"line": "fine", "kernels": kernels, "seconds": 0}
        if name in fails:
            result = {"failed": fails[name], "kernels": kernels, "seconds": 0}
        path = Path(args.out) / f"{name}.json"
        path.write_text(json.dumps(result))
        return result

    monkeypatch.setattr(first_gpu, "run_stage", run_stage)
    return ran


def test_a_second_call_runs_what_failed(tmp_path, monkeypatch):
    ran = simulate(monkeypatch, {"graph": "wrong", "bench": "wrong"})
    first_gpu.main(arguments(tmp_path, "--kernels", "torch"))
    assert ran == [(name, "torch") for name in first_gpu.STAGES]        # a failure stops nothing
    ran = simulate(monkeypatch, {})
    first_gpu.main(arguments(tmp_path, "--kernels", "torch"))
    assert ran == [("graph", "torch"), ("bench", "torch")]
    ran.clear()
    first_gpu.main(arguments(tmp_path, "--kernels", "torch", "--stages", "limits"))
    assert ran == [("limits", "torch")]


def test_where_a_kernel_is_wrong_later_stages_use_twins(tmp_path, monkeypatch):
    ran = simulate(monkeypatch, {"kernels": "cut off after 200 s"})     # slow: nobody knows of a fault
    first_gpu.main(arguments(tmp_path, "--kernels", "triton"))
    assert ran[:3] == [("limits", "triton"), ("kernels", "triton"), ("graph", "triton")]
    for path in tmp_path.glob("*.json"):
        path.unlink()
    ran = simulate(monkeypatch, {"kernels": "AssertionError: 3 of 129 kernel tests passed"})
    first_gpu.main(arguments(tmp_path, "--kernels", "triton"))
    assert ran[:3] == [("limits", "triton"), ("kernels", "triton"), ("graph", "torch")]
    ran = simulate(monkeypatch, {})                                     # it is mended
    first_gpu.main(arguments(tmp_path, "--kernels", "triton"))
    assert ran == [(name, "triton") for name in first_gpu.STAGES if name != "limits"]


def test_what_takes_too_long_is_cut_off_and_what_has_no_time_is_left_out(tmp_path):
    args = first_gpu.parse_arguments(arguments(tmp_path))
    result = first_gpu.run_stage(args, "limits", "torch", 0.2)
    assert result["failed"] == "cut off after 0 s"
    assert json.loads((tmp_path / "limits.json").read_text()) == result
    results = first_gpu.main(arguments(tmp_path, "--seconds", "1"))
    assert all(result["failed"].startswith("left out") for result in results.values())


def test_a_failure_keeps_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    args = first_gpu.parse_arguments(arguments(tmp_path))
    result = first_gpu.run_stage(args, "bench", "no such kernels", 60)
    assert "invalid choice" in result["failed"]
    assert "usage:" in (tmp_path / "bench.log").read_text()
