# After any mixer's config: size M of the mHC-lite paper (arXiv 2601.05732) on OpenWebText.
# torchrun --standalone --nproc_per_node=8 train.py config/permutation.py config/mhc_lite_m.py
# The sizes and learning rates are from the paper. We found no published losses to compare with.
n_layer, n_head, n_embd = 12, 12, 768
batch_size = 16
total_batch_tokens = 16 * 1024 * 1 * 8  # sequences * tokens * micro-steps * GPUs = 131,072
max_iters = lr_decay_iters = 10_000  # 10,000 steps * 131,072 tokens = 1,310,720,000
warmup_iters, learning_rate, min_lr = 200, 6e-4, 6e-5
eval_interval, eval_tokens = 500, 200 * 16 * 1024
checkpoint_interval = 500
out_dir = f"out/mhc-lite-m-{out_dir[4:] or mixer}"  # out/tbp: out/mhc-lite-m-tbp
