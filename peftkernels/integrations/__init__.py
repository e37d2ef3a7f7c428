"""What plugs peftkernels into other libraries, one folder a library."""
