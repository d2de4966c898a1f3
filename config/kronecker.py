# GPT-2 124M with 4 streams mixed by Kronecker products (KromHC) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/kronecker.py
mixer = "kronecker"
out_dir = f"out/{mixer}"
