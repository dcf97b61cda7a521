"""The sensors of the ego vehicle: channels, poses and intrinsics, rounded numbers near those of nuScenes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FULL_WIDTH, FULL_HEIGHT = 1600, 900
BEAMS = 32
ELEVATIONS: Array = np.deg2rad(np.linspace(-30.67, 10.67, BEAMS))  # elevation of every beam, ring 0 lowest

# Channel: x, y, z in the ego frame (m); heading of the optical axis (degrees, left positive); focal length and
# principal point at 1600 x 900 (pixels).
_CAMERAS: dict[str, tuple[float, float, float, float, float, float, float]] = {
    "CAM_FRONT": (1.70, 0.00, 1.51, 0.3, 1262.0, 814.0, 494.0),
    "CAM_FRONT_RIGHT": (1.55, -0.49, 1.50, -56.0, 1258.0, 806.0, 491.0),
    "CAM_BACK_RIGHT": (1.02, -0.48, 1.56, -110.5, 1256.0, 808.0, 497.0),
    "CAM_BACK": (0.03, 0.00, 1.57, 180.0, 806.0, 824.0, 486.0),
    "CAM_BACK_LEFT": (1.04, 0.48, 1.58, 108.5, 1254.0, 796.0, 490.0),
    "CAM_FRONT_LEFT": (1.53, 0.49, 1.51, 55.0, 1268.0, 822.0, 484.0),
}
_RADARS: dict[str, tuple[float, float, float, float]] = {
    "RADAR_FRONT": (3.41, 0.00, 0.50, 0.0),
    "RADAR_FRONT_LEFT": (2.42, 0.80, 0.78, 90.0),
    "RADAR_FRONT_RIGHT": (2.42, -0.80, 0.77, -90.0),
    "RADAR_BACK_LEFT": (-0.56, 0.62, 0.53, 175.0),
    "RADAR_BACK_RIGHT": (-0.56, -0.62, 0.53, -175.0),
}
_LIDAR = (0.94, 0.0, 1.84, -90.0)

CAMERAS = tuple(_CAMERAS)
RADARS = tuple(_RADARS)
LIDAR = "LIDAR_TOP"
CHANNELS: dict[str, str] = {
    **dict.fromkeys(CAMERAS, "camera"),
    LIDAR: "lidar",
    **dict.fromkeys(RADARS, "radar"),
}


class Sensor(NamedTuple):
    """A sensor on the vehicle."""

    channel: str
    translation: Array  # [3] metres, in the ego frame
    rotation: Array  # [3, 3] ego_R_sensor
    intrinsic: Array | None  # [3, 3] pixels; None unless a camera

    @property
    def ego_SE3_sensor(self) -> Array:
        """Pose in the ego frame, [4, 4]."""
        return se3(self.rotation, self.translation)

    @property
    def quaternion(self) -> list[float]:
        """The rotation as w, x, y, z."""
        return quaternion(self.rotation)


def se3(rotation: Array, translation: Array) -> Array:
    """Return the [4, 4] transform of a rotation [3, 3] and a translation [3]."""
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation, translation
    return transform


def planar(x: float, y: float, z: float, yaw: float) -> Array:
    """Return the [4, 4] pose of an upright body."""
    c, s = np.cos(yaw), np.sin(yaw)
    return se3(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), np.array([x, y, z]))


def upright_quaternion(yaw: float) -> list[float]:
    """Return w, x, y, z of a turn about z, w >= 0."""
    half = (yaw + np.pi) % (2 * np.pi) / 2 - np.pi / 2
    return [float(np.cos(half)), 0.0, 0.0, float(np.sin(half))]


def quaternion(rotation: Array) -> list[float]:
    """Return w, x, y, z of a rotation matrix, w >= 0."""
    from scipy.spatial.transform import Rotation  # late: the process that plans a city reads the names of channels only

    x, y, z, w = Rotation.from_matrix(rotation).as_quat(canonical=True)
    return [float(w), float(x), float(y), float(z)]


def cameras(image: tuple[int, int]) -> list[Sensor]:
    """Return the six cameras for a picture of (height, width) pixels.

    The picture is the 1600 x 900 one scaled to the width; what is too high is cut off at the top, as detectors do.
    """
    height, width = image
    scale = width / FULL_WIDTH
    cut = FULL_HEIGHT * scale - height
    camera_axes = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # of (right, down, forward), in (x, y, z)
    sensors = []
    for channel, (x, y, z, heading, focal, cx, cy) in _CAMERAS.items():
        rotation = _turn(heading) @ camera_axes
        f = focal * scale
        intrinsic = np.array([[f, 0, cx * scale], [0, f, cy * scale - cut], [0, 0, 1]])
        sensors.append(Sensor(channel, np.array([x, y, z]), rotation, intrinsic))
    return sensors


def _upright(channel: str, x: float, y: float, z: float, heading: float) -> Sensor:
    return Sensor(channel, np.array([x, y, z]), _turn(heading), None)


def _turn(degrees: float) -> Array:
    """Return the rotation matrix of a turn to the left about z."""
    from scipy.spatial.transform import Rotation  # late: as in `quaternion`

    return np.asarray(Rotation.from_euler("z", degrees, degrees=True).as_matrix())


def lidar() -> Sensor:
    """Return the LiDAR on the roof: x right, y forward, z up."""
    return _upright(LIDAR, *_LIDAR)


def radars() -> list[Sensor]:
    """Return the five RADARs."""
    return [_upright(channel, *pose) for channel, pose in _RADARS.items()]
