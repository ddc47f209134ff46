"""Two training runs, checkpoints, bundles or reports held side by side: what `mpdsgr inspect A B` shows.

side       what A or B is, read and verified
settings   in what recipes and facts differ
networks   both networks on the same images: spikes that differ, membrane potentials, clean verdicts
verdicts   recorded verdicts on the same images under the same attacks, paired
compare    all parts, and why a part was left out
"""
