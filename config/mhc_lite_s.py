# After any mixer's config: size S of the mHC-lite paper (arXiv 2601.05732) on OpenWebText.
# torchrun --standalone --nproc_per_node=8 train.py config/permutation.py config/mhc_lite_s.py
# The sizes and learning rates are from the paper. We found no published losses to compare with.
n_layer, n_head, n_embd = 6, 8, 512
batch_size = 16
total_batch_tokens = 16 * 1024 * 1 * 8  # sequences * tokens * micro-steps * GPUs = 131,072
max_iters = lr_decay_iters = 10_000  # 10,000 steps * 131,072 tokens = 1,310,720,000
warmup_iters, learning_rate, min_lr = 200, 1e-3, 1e-4
eval_interval, eval_tokens = 500, 200 * 16 * 1024
checkpoint_interval = 500
out_dir = f"out/mhc-lite-s-{out_dir[4:] or mixer}"  # out/tbp: out/mhc-lite-s-tbp
