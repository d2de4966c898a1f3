# A new run from the weights of another, on other texts with the same tokenizer:
# python train.py config/finetune.py --init_from=auto:out/tbp --dataset=mytexts
# The model is the checkpoint's. Another --block_size goes before this file, whose lines compute
# with it. The same command continues the run; without auto: it refuses a folder that has a run.
batch_size = 4
total_batch_tokens = 4 * block_size * 8 * 1  # sequences * block_size * micro-steps * GPUs
max_iters = lr_decay_iters = 1000  # 1000 steps * 32 sequences * 1024 tokens = 32,768,000
warmup_iters, learning_rate, min_lr = 50, 3e-5, 3e-6  # rates: a twentieth of train.py's
dropout = 0.1  # the texts are few, and seen more than once
eval_interval, eval_tokens = 100, 64 * block_size
checkpoint_interval = 100  # best.pt is kept as well: later checkpoints may have overfitted
out_dir = "out/finetune"
