# GPT-2 124M with 4 unconstrained streams (hyper-connections) on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/hc.py
mixer = "hc"
out_dir = f"out/{mixer}"
