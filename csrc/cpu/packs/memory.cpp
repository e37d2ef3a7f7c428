#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <fstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace peftkernels::cpu {
namespace {

// The number after `name` in a file of lines "name number"; the first number of the file where `name` is empty.
// Nothing where there is no such file, name or number: a control group without a limit says "max".
std::optional<int64_t> number_in(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  while (file) {
    if (!name.empty() && !(file >> word)) {
      return std::nullopt;
    }
    if (word == name) {
      int64_t value = 0;
      return file >> value ? std::optional<int64_t>(value) : std::nullopt;
    }
    std::getline(file, word);
  }
  return std::nullopt;
}

// Where one version of control groups keeps what.
struct GroupFiles {
  const char *mount, *limit, *usage, *reclaimable;
};
constexpr GroupFiles kVersion1{
    "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr GroupFiles kVersion2{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};

// The least that a control group and those above it leave. In a container the groups' names may be those of the host,
// of which only the mount point itself is there.
std::optional<int64_t> left_by_groups(const std::string& root, const GroupFiles& files, std::string group) {
  std::optional<int64_t> least;
  for (;;) {
    const auto folder = root + files.mount + group + "/";
    const auto limit = number_in(folder + files.limit, ""), usage = number_in(folder + files.usage, "");
    if (limit && usage) {
      const auto left = *limit - *usage + number_in(folder + "memory.stat", files.reclaimable).value_or(0);
      least = std::min(least.value_or(left), left);
    }
    if (group.empty()) {
      return least;
    }
    group.erase(group.rfind('/'));
  }
}

// From torch's allocator, whose one complaint of such a request is that there is no memory.
at::Tensor empty_or_none(int64_t rows, int64_t columns, at::ScalarType dtype) {
  try {
    return at::empty({rows, columns}, dtype);
  } catch (const c10::Error&) {
    return {};
  }
}

} // namespace

std::optional<int64_t> available_memory(const std::string& root) {
  std::optional<int64_t> available;
  if (const auto kibibytes = number_in(root + "/proc/meminfo", "MemAvailable:")) {
    available = *kibibytes * 1024;
  }
#if defined(_SC_PHYS_PAGES) && defined(_SC_PAGESIZE)
  if (!available) {
    available = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  }
#endif
  // Lines "number:controllers:/group"; version 2 has no controllers.
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const auto colon = line.find(':'), path = line.find(":/");
    if (path == std::string::npos) {
      continue;
    }
    const auto controllers = "," + line.substr(colon, path - colon).erase(0, 1) + ",";
    if (controllers != ",," && controllers.find(",memory,") == std::string::npos) {
      continue;
    }
    auto group = line.substr(path + 1);
    if (group == "/") {
      group.clear();
    }
    if (const auto left = left_by_groups(root, controllers == ",," ? kVersion2 : kVersion1, group)) {
      available = std::min(available.value_or(*left), *left);
    }
  }
  return available ? std::optional<int64_t>(std::max<int64_t>(0, *available)) : std::nullopt;
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

at::Tensor empty_in_huge_pages(int64_t rows, int64_t columns, at::ScalarType dtype, int64_t least) {
  const auto bytes = static_cast<size_t>(rows * columns) * c10::elementSize(dtype);
  if (static_cast<int64_t>(bytes) < least) {
    return empty_or_none(rows, columns, dtype);
  }
  // Mapped with room to spare, which is cut off again so that the tensor begins at a huge page.
  constexpr size_t kHugePage = size_t{1} << 21;
  const size_t spare = bytes + kHugePage;
  void* const map = mmap(nullptr, spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    return {};
  }
  const auto up = [](size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; };
  const auto first = reinterpret_cast<size_t>(map), begin = up(first, kHugePage);
  const auto end = up(begin + bytes, static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  const auto unmap = [](size_t from, size_t to) {
    if (from < to) {
      munmap(reinterpret_cast<void*>(from), to - from);
    }
  };
  unmap(first, begin);
  unmap(end, first + spare);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return at::from_blob(
      reinterpret_cast<void*>(begin), {rows, columns}, [=](void*) { unmap(begin, end); },
      at::TensorOptions().dtype(dtype));
}

#else

at::Tensor empty_in_huge_pages(int64_t rows, int64_t columns, at::ScalarType dtype, int64_t /*least*/) {
  return empty_or_none(rows, columns, dtype);
}

#endif

} // namespace peftkernels::cpu
