"""The gRPC surface: the only room that touches protobuf."""
