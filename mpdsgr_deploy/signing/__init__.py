"""Signatures of bundles and reports, in formats that other tools can read.

A bundle is signed in the OpenSSF model-signing format (`model_signing verify` accepts it), a report as an in-toto
test-result statement in an envelope of the same kind: DSSE in a Sigstore bundle. Both need the extra `sign`.
"""
