"""What plugs peftkernels into other libraries, one file a library."""
