# After any mixer's config: coefficients see only the branch's input, and reads are taken one
# sublayer ahead, so that a sublayer reads the streams once and writes them once.
# At a rate of .008, config/studies/lean.py, a quarter of it was better for the connections of tbp
# (seed 1): --connection_lr=0.25.
# torchrun --standalone --nproc_per_node=8 train.py config/tbp.py config/lean.py
sees = "input"
readout = "learned"  # the last sublayer reads ahead for the head
out_dir = f"out/lean-{out_dir[4:] or mixer}"  # out/tbp: out/lean-tbp
