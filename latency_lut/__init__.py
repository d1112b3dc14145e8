"""What a layer costs on a device, measured in the runtime that ships it."""
