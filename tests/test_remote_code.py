"""Compressed checkpoints in a fresh interpreter: without this package, and with it but not yet imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_mcsmoe

# The package may be installed in this environment; the finder stands for one where it is not.
WITHOUT_PACKAGE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_mcsmoe":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
START = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
mapped, native, folder = map(Path, sys.argv[1:])
prompt = torch.arange(3, 31).view(2, 14)

@torch.no_grad()
def logits(checkpoint, **kwargs):
    return AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)(input_ids=prompt).logits.contiguous()
"""
LOAD_WITHOUT_PACKAGE = """
errors = {}
for flag in (None, False, True):
    try:
        AutoModelForCausalLM.from_pretrained(mapped, trust_remote_code=flag)
    except Exception as error:
        errors[str(flag)] = [type(error).__name__, str(error)]
(folder / "errors.json").write_text(json.dumps(errors))
save_file({"native": logits(native)}, folder / "logits.safetensors")
"""
LOAD_WITH_PACKAGE = """
assert "hf_mcsmoe" not in sys.modules
trusted = logits(mapped, trust_remote_code=True)
assert "hf_mcsmoe" in sys.modules
save_file({"trusted": trusted, "registered": logits(mapped)}, folder / "logits.safetensors")
"""
IMPORT_PACKAGE = """
import hf_mcsmoe
found = {"imported": logits(mapped), "refused": logits(mapped, trust_remote_code=False)}
save_file(found, folder / "logits.safetensors")
"""
PROMPT = torch.arange(3, 31).view(2, 14)


@pytest.fixture(scope="module")
def checkpoints(compressed, tmp_path_factory):
    """Folders of a mapped and of a native checkpoint."""
    folders = {layout: tmp_path_factory.mktemp("checkpoints") / layout for layout in ("mapped", "native")}
    for layout, folder in folders.items():
        compressed("qwen3_moe", layout).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def start(checkpoints, tmp_path_factory):
    """`start(code)`: a process in an interpreter that knows nothing of this one, and the folder it writes to."""

    def run(code: str, *, with_package: bool) -> tuple[subprocess.Popen, Path]:
        folder = tmp_path_factory.mktemp("fresh")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if with_package:
            environment["PYTHONPATH"] = str(Path(hf_mcsmoe.__file__).parents[1])
        else:
            code = WITHOUT_PACKAGE + code
        command = [sys.executable, "-c", code, *checkpoints.values(), folder]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, cwd=folder, text=True, **streams), folder

    return run


def wait(started: tuple[subprocess.Popen, Path]) -> Path:
    process, folder = started
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def finished(start):
    """The folders that a process without and one with the package wrote to, side by side."""
    both = [
        start(START + LOAD_WITHOUT_PACKAGE, with_package=False),
        start(START + LOAD_WITH_PACKAGE, with_package=True),
    ]
    return dict(zip(("without", "with"), map(wait, both), strict=True))


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=PROMPT).logits


@pytest.mark.slow
def test_a_native_checkpoint_needs_nothing_but_transformers(finished, checkpoints):
    found = load_file(finished["without"] / "logits.safetensors")
    assert torch.equal(found["native"], logits(checkpoints["native"]))


def test_a_mapped_checkpoint_without_the_package_names_it(finished):
    kind, message = json.loads((finished["without"] / "errors.json").read_text())["True"]
    assert kind == "ImportError"
    assert "requires the following packages" in message and "pip install hf_mcsmoe" in message


@pytest.mark.parametrize("flag", ["None", "False"])
def test_without_trust_a_mapped_checkpoint_points_to_a_file_that_names_the_package(flag, finished, checkpoints):
    # This message is transformers' own and quotes nothing of a checkpoint but its path; what lies there must tell.
    kind, message = json.loads((finished["without"] / "errors.json").read_text())[flag]
    assert kind == "ValueError"
    assert str(checkpoints["mapped"]) in message and "trust_remote_code=True" in message
    (shim,) = checkpoints["mapped"].glob("*.py")
    assert shim.name == "modeling_hf_mcsmoe.py"
    assert "needs the package hf_mcsmoe: pip install hf-mcsmoe" in shim.read_text().splitlines()[0]


def test_the_package_is_imported_where_remote_code_is_trusted(finished, checkpoints):
    found = load_file(finished["with"] / "logits.safetensors")
    for name in ("trusted", "registered"):
        assert torch.equal(found[name], logits(checkpoints["mapped"])), name


@pytest.mark.slow
def test_importing_the_package_is_enough(start, checkpoints):
    found = load_file(wait(start(START + IMPORT_PACKAGE, with_package=True)) / "logits.safetensors")
    for name in ("imported", "refused"):
        assert torch.equal(found[name], logits(checkpoints["mapped"])), name


def test_everything_that_auto_map_names_is_in_the_shim_and_the_package(checkpoints):
    config = json.loads((checkpoints["mapped"] / "config.json").read_text())
    names = {"modeling_hf_mcsmoe": set()}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        names[module].add(name)
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} < set(config["auto_map"])
    defined: dict[str, object] = {}
    exec((checkpoints["mapped"] / "modeling_hf_mcsmoe.py").read_text(), defined)
    assert names["modeling_hf_mcsmoe"] <= set(defined)
    assert names["modeling_hf_mcsmoe"] <= set(hf_mcsmoe.__all__)
