"""The plug-in that lets vLLM serve mapped checkpoints: entry point group `vllm.general_plugins`.

vLLM (https://docs.vllm.ai/en/latest/design/plugin_system.html) calls `register` in every process that it starts, so a
checkpoint loads by `vllm serve DIR` where this package is installed, without trusting remote code. Native checkpoints
need no plug-in.
"""

ARCHITECTURE = "MergedSparseMoeForCausalLM"  # what config.json of a mapped causal model says
MODEL = "hf_mcsmoe.serving.vllm_model:MergedSparseMoeForVllm"


def register() -> None:
    """Make the architecture of mapped checkpoints known to vLLM; importing this package did so to transformers.

    It may be called any number of times. The model class is named, not imported: importing it would initialise CUDA
    in processes that are forked later.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
