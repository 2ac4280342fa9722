"""What lies on disk: model folders, adapters, tensors and data files. Reads and writes; decides nothing."""
