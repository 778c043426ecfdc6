"""Native results in runtimes that we did not write, on the CPU: mlx-lm and llama.cpp give the logits of transformers.

Run with mlx-lm 0.32.2 (mlx 0.32.4), convert-hf-to-gguf 0.1.1 and llama-cpp-python 0.3.36, built from source with gcc.
"""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_mcsmoe
from hf_mcsmoe import Recipe, compress_moe, export_checkpoint
from hf_mcsmoe.loading import load_tokenizer

pytestmark = pytest.mark.slow
ORIGINAL = Path(hf_mcsmoe.__file__).parent / "assets" / "tiny-qwen3-moe"  # for its tokenizer
# As in the published models: llama.cpp takes these for granted. The rope differs from what any runtime assumes.
FAMILIES = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "mixtral": {},
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}
KINDS = {
    "fewer": Recipe(keep=0.5, layout="native"),
    "narrower": Recipe(keep=0.5, layout="native", selection="gated_obs", refit="least_squares"),
    "exported": Recipe(keep=0.5, allocation="uniform"),
    "filled_up": Recipe(keep=0.2, selection="gated_obs"),
}
# The pre-tokenizer is recognised by the hash of a published tokenizer, which ours is not. Logits do not depend on it.
CONVERT = """
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
F32 = 0  # GGML_TYPE_F32


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """`result(model_type, kind)`: the folder of a native result, its token ids and its logits."""

    @functools.cache
    def make(model_type, kind):
        folder = tmp_path_factory.mktemp(model_type) / kind
        tokenizer = load_tokenizer(ORIGINAL)
        model = tiny_model(model_type, vocab_size=len(tokenizer), **FAMILIES[model_type], **ROPE)
        rows = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))
        ids = torch.randint(3, 150, (3, 11), generator=torch.Generator().manual_seed(1))
        output = folder if KINDS[kind].layout == "native" else folder.with_name("mapped")
        how = {"calibration": rows, "tokenizer": tokenizer, "output_dir": output, "progress": False}
        compress_moe(model, KINDS[kind], **how)
        if output != folder:
            export_checkpoint(output, folder, progress=False)
        with torch.no_grad():
            return folder, ids, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits.numpy()

    return make


def close(found, expected):
    """Equal to the rounding of float32, for logits that differ a thousand times as much between tokens."""
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlx_lm_gives_our_logits(model_type, kind, result):
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install hf-mcsmoe[export-tests]")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed: pip install hf-mcsmoe[export-tests]")
    folder, ids, expected = result(model_type, kind)
    model, _ = utils.load_model(folder)
    close(np.array(model(mlx.array(ids.numpy()))), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_llama_cpp_gives_our_logits(model_type, kind, result, tmp_path):
    reason = "is not installed: pip install hf-mcsmoe[export-tests]"
    pytest.importorskip("convert_hf_to_gguf", reason=f"convert-hf-to-gguf {reason}")
    llama_cpp = pytest.importorskip("llama_cpp", reason=f"llama-cpp-python {reason}")
    folder, ids, expected = result(model_type, kind)
    file = tmp_path / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(folder), "--outtype", "f32", "--outfile", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    how = {"logits_all": True, "n_ctx": 64, "n_threads": 1, "type_k": F32, "type_v": F32, "verbose": False}
    model = llama_cpp.Llama(str(file), **how)
    found = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        found.append(np.array(model.scores[: len(row)]))
    model.close()
    close(np.stack(found), expected)
