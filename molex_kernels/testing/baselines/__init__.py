"""What users would compose themselves: published code and libraries, beside the ops."""
