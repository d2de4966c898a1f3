# GPT-2 124M with 4 streams that meet only in reads and writes (iHC) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/identity.py
mixer = "identity"
out_dir = f"out/{mixer}"
