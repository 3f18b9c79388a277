"""Post-training for image inpainting models on DeepSpeed, with reward models over gRPC."""
