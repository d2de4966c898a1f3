# GPT-2 124M with 4 TBP streams on OpenWebText, on one node of 8 GPUs:
# torchrun --standalone --nproc_per_node=8 train.py config/tbp.py
mixer, n_streams = "tbp", 4
out_dir = f"out/{mixer}"
dataset = "openwebtext"
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
batch_size = 12
total_batch_tokens = 12 * 1024 * 5 * 8      # 12 sequences * 1024 tokens * 5 micro-steps * 8 GPUs = 491,520
max_iters = lr_decay_iters = 600_000        # 295B tokens, 33 epochs; nanoGPT's schedule
