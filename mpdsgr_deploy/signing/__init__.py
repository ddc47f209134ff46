"""Signatures of bundles and reports, in formats that other tools read.

A bundle is signed in the OpenSSF model-signing format (`model_signing verify` accepts it), a report as an in-toto
test-result statement in the same kind of envelope: DSSE in a Sigstore bundle. Both need the extra `sign`.
"""
