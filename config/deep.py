# Deep and thin, where hc and the exact mixers differ within 1000 steps: after config/laptop.py.
n_layer, n_head, n_embd = 24, 2, 64
max_iters = lr_decay_iters = 1000
warmup_iters = 100
learning_rate, min_lr = 8e-3, 8e-4  # config/studies/rates.py: best for residual, hc; tbp: half
eval_interval, checkpoint_interval = 250, 500
