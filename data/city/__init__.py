"""A synthetic city, ray cast and written as a nuScenes dataroot."""

from data.city.config import CityConfig
from data.city.generate import generate, plan_scenes

__all__ = ["CityConfig", "generate", "plan_scenes"]
