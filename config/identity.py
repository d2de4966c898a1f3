# GPT-2 124M with 4 streams that only reads and writes mix (iHC) on OpenWebText, train.py's own job:
# torchrun --standalone --nproc_per_node=8 train.py config/identity.py
mixer = "identity"
out_dir = f"out/{mixer}"
