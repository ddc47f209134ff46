"""The version of the attack suite that accuracies are measured with."""

# Raise it when a tier gets a stronger attack: `worst` of an earlier version is then an upper bound of what survives.
# Result records carry it and pages name it: after a change, `mpdsgr table --render-only` and `mpdsgr study
# --render-only` render all pages again.
SUITE_VERSION = 3
