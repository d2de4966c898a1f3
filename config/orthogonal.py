# GPT-2 124M with 4 streams, mixed by rotations and one learned number a sublayer, on OpenWebText:
# torchrun --standalone --nproc_per_node=8 train.py config/orthogonal.py
# M keeps norms, has signs, and is not doubly stochastic. README, "What the mixers do", has why.
mixer = "orthogonal"
mix_scale = "sublayer"
out_dir = f"out/{mixer}"
