// An image's crops, in one call: what a crop's resampling has written is still near when its colours read it.

#include "pixels.h"

#ifdef __AVX512F__

EXPORT void dinov2_crops(const Byte* pixels, std::int64_t row_bytes, std::int64_t count, const Crop* crops) {
  for (std::int64_t i = 0; i < count; ++i) {
    resample(pixels, row_bytes, crops[i]);
    recolour(crops[i]);
  }
}

#endif
