# After any mixer's config: coefficients see only the branch's input, and reads are taken one
# sublayer ahead, so that a sublayer reads the streams once and writes them once.
# At a rate of .008 the connections of tbp learned better at a quarter of it (seed 1,
# config/studies/lean.py): --connection_lr=0.25.
# torchrun --standalone --nproc_per_node=8 train.py config/tbp.py config/lean.py
sees = "input"
readout = "learned"  # the last sublayer reads ahead for the head
out_dir = f"out/lean-{out_dir[4:] or mixer}"  # out/tbp: out/lean-tbp
