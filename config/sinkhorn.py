# GPT-2 124M with 4 Sinkhorn streams (mHC) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/sinkhorn.py
mixer = "sinkhorn"
out_dir = f"out/{mixer}"
