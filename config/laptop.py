# After any mixer's config: minutes on two CPU cores, on the sources of Python's standard library.
# python prepare_data.py && python train.py config/tbp.py config/laptop.py
dataset = "stdlib"
out_dir = f"out/laptop-{out_dir[4:] or mixer}"  # out/tbp: out/laptop-tbp
n_layer, n_head, n_embd, block_size = 4, 4, 128, 128
batch_size = 16
total_batch_tokens = 16 * 128  # 16 sequences * 128 tokens = 2,048
max_iters = lr_decay_iters = 2000  # 4.1M tokens
warmup_iters = 100
learning_rate, min_lr = 2e-3, 2e-4
eval_interval, eval_tokens = 250, 40 * 16 * 128
checkpoint_interval = 500
log_interval = 20
