# After any mixer's config: llm.c's GPT-2 124M, one epoch of FineWeb 10B.
# python prepare_data.py kjj0/fineweb10B-gpt2
# torchrun --standalone --nproc_per_node=8 train.py config/residual.py config/fineweb.py
# Published for llm.c's own trainer after 10B tokens (not measured here): validation loss 3.28.
dataset = "fineweb10B-gpt2"
bias = True
batch_size = 16
total_batch_tokens = 16 * 1024 * 4 * 8  # sequences * tokens * micro-steps * GPUs = 524,288
max_iters = lr_decay_iters = 19_560  # 19,560 steps * 524,288 tokens = 10,255,073,280
warmup_iters, learning_rate, min_lr = 700, 6e-4, 0.0
eval_interval, eval_tokens = 250, 20 * 524_288
checkpoint_interval = 1000
out_dir = f"out/fineweb-{out_dir[4:] or mixer}"  # out/tbp: out/fineweb-tbp
