# GPT-2 124M with 4 streams mixed by permutations (mHC-lite) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/permutation.py
mixer = "permutation"
out_dir = f"out/{mixer}"
