"""
Weights from elsewhere.

    >>> model = GPT(GPTConfig(mixer="tbp", n_streams=4))
    >>> load_gpt2(model, torch.load("pytorch_model.bin", weights_only=True))
"""

import torch


@torch.no_grad()
def load_gpt2(model, state):
    """Copy GPT-2's weights into the branches and embeddings of a model with any mixer.

    state: OpenAI's weights under the names that Hugging Face gives them. At the start the n-stream
    model computes what GPT-2 computes. Positions beyond block_size are dropped; tokens beyond
    GPT-2's 50257 keep their own start. ValueError where a weight is missing or a shape differs.
    """
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for name, parameter in model.named_parameters():
        if not is_gpt2s(name):
            continue
        theirs = name.replace("embed.", "").replace("blocks.", "h.").replace("head.", "")
        if theirs not in state:
            raise ValueError(
                f"the GPT-2 weights have no {theirs} for {name}; "
                f"does n_layer {model.config.n_layer} fit?"
            )
        tensor = state[theirs]
        if theirs == "wpe.weight" and len(tensor) < len(parameter):
            raise ValueError(
                f"block_size {len(parameter)} is longer than the {len(tensor)} positions of the "
                "GPT-2 weights"
            )
        if theirs.startswith("h.") and tensor.ndim == 2:
            tensor = tensor.t()  # GPT-2's linear layers are stored (in, out)
        rows = len(parameter)
        if name.startswith("embed."):
            rows = min(len(tensor), rows)
        elif len(tensor) != rows:
            rows = 0
        if not rows or tensor[:rows].shape != parameter[:rows].shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, GPT-2's {theirs} has "
                f"{tuple(tensor.shape)}"
            )
        parameter[:rows] = tensor[:rows]


def is_gpt2s(name):
    """Whether a parameter of ours is one that GPT-2 has: no hyper-connection's, and no start's."""
    return not any(part in name for part in (".hc_", "read_out", "offsets", "x0_scalars"))
