"""Standalone gRPC servers that score inpainted images; they share only the wire contract with the trainer."""
