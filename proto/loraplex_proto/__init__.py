"""The wire format of Loraplex: generated from the .proto files beside it (``make proto``)."""
