# GPT-2 124M with 4 TBP streams on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/tbp.py
mixer = "tbp"
out_dir = f"out/{mixer}"
