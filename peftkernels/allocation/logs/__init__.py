"""What an allocator reports while it runs, and what writes it down: logs, cards and TensorBoard scalars."""
