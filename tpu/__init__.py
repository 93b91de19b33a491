"""What a TPU needs. Nothing here yet but the door: `pipeline.strategy` refuses `tpu` until this room is furnished."""
