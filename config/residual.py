# GPT-2 124M with the plain residual stream on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/residual.py
# This is nanoGPT's baseline. Published there, after 600,000 steps: validation loss about 2.85.
mixer = "residual"
n_streams = 1
out_dir = f"out/{mixer}"
