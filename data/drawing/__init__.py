"""Pictures of keyframes and of what was found in them."""
