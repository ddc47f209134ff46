"""Two training runs, checkpoints, bundles or reports held side by side: what `mpdsgr inspect A B` shows.

side       reads and verifies A or B
settings   differences of recipes and facts
networks   both networks on the same images: spikes that differ, membrane potentials, clean verdicts
verdicts   recorded verdicts on the same images under the same attacks, paired
compare    all of these, and why a part was left out
"""
