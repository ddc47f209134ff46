"""A server of the Open Inference Protocol (v2) over HTTP and gRPC. torch is not imported here."""
