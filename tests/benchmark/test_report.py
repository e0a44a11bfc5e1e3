"""The report that can be sent in: enough to judge by, and nothing of whose it is."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from vllm_sarathi import __version__
from vllm_sarathi.benchmark.common import report
from vllm_sarathi.benchmark.common.report import write_report
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.core.config import ConfigError

ROW = {"workload": "mix", "tbt_slo_ms": 1140.0, "scheduler": "sarathi", "attainment": 0.999}


def test_it_says_what_ran_on_what_and_nothing_of_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    home = tmp_path / "home-of-telltale" / "private-finetune"
    tiny_model(home)
    monkeypatch.chdir(home)
    path = home / "report.json"
    report.check_report(path)
    write_report(path, [ROW], {"factors": {"times": 4.55}}, str(home), seed=3, quick=True)
    text = path.read_text()
    told = json.loads(text)
    assert list(told) == ["schema", "versions", "device", "model", "seed", "quick", "scale", "rows"]
    assert (told["schema"], told["rows"], told["seed"], told["quick"]) == (1, [ROW], 3, True)
    assert told["versions"]["vllm_sarathi"] == __version__
    assert set(told["versions"]) == {"vllm_sarathi", "python", "vllm", "torch"}
    assert told["versions"]["torch"]
    assert told["device"]["kind"] in ("cpu", "gpu")
    assert told["model"]["hidden_size"] == 64
    assert told["scale"]["factors"]["times"] == 4.55
    for secret in ("telltale", "private-finetune", str(tmp_path), socket.gethostname(), str(Path.home())):
        assert secret not in text
    words = text.replace('"', " ").replace(",", " ").split()
    assert getpass.getuser() not in words


def test_a_name_on_a_hub_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, [], None, "telltale/private", seed=0, quick=False)
    assert "telltale" not in path.read_text()
    assert "private" not in path.read_text()
    assert json.loads(path.read_text())["model"] is None


def test_a_cpu_is_its_model_and_the_flags_that_matter(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    one = "processor : {}\nmodel name : A Fast CPU\nflags : fpu avx2 avx512_bf16 amx_tile sse hypervisor\n\n"
    info.write_text(one.format(0) + one.format(1))
    assert report._cpu(info) == {
        "model": "A Fast CPU",
        "cores": 2,
        "flags": ["avx2", "avx512_bf16", "amx_tile"],
    }
    assert report._cpu(tmp_path / "nothing")["flags"] == []


def test_what_of_a_config_is_told_is_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "_name_or_path": "/home/telltale/x",
                "hidden_size": 64,
                "quantization_config": {"quant_method": "fp8"},
            }
        )
    )
    assert report._model(str(tmp_path)) == {"hidden_size": 64, "quantization": "fp8"}
    for text in ("{", "[1]", '"x"'):
        (tmp_path / "config.json").write_text(text)
        assert report._model(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "quantization_config": "fp8"}')
    assert report._model(str(tmp_path)) == {"hidden_size": 64, "quantization": None}


def test_a_report_goes_into_a_folder_that_is_there(tmp_path: Path) -> None:
    report.check_report(tmp_path / "report.json")
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "a" / "b.json", "is not there")):
        with pytest.raises(ConfigError, match=said):
            report.check_report(path)
    assert not (tmp_path / "a").exists()
