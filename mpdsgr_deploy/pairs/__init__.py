"""Compare two training runs, checkpoints, bundles or reports, as `mpdsgr inspect A B` shows them.

side            reads and verifies A or B
network_pair    runs both networks on the same images: spikes that differ, membrane potentials, clean verdicts
verdicts        pairs recorded verdicts on the same images under the same attacks
differences     compares all of these, and recipes, facts and training curves; says why a part was left out
pair_plots      plots membrane potentials and training curves
"""
