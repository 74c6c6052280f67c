"""HNeRV-CLIP: video networks that know what they show."""
