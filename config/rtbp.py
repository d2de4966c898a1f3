# GPT-2 124M with 4 RTBP streams (the recursive chart) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/rtbp.py
mixer = "rtbp"
out_dir = f"out/{mixer}"
