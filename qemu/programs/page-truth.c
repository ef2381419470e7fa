/*
 * Copies /proc/kpageflags, /proc/kpagecount and /proc/kpagecgroup to a raw
 * disk: for each page of memory, what the kernel says it is. The last thing
 * the guest does before it is ready, in one go and past the page cache, so
 * that it changes little of what it tells.
 *
 *   page-truth DISK
 *
 * The disk's first block is text, a line "name offset bytes" for each file.
 */
#include <sys/mman.h>

#include "planted.h"

#define BLOCK 4096ul
#define ROOM (64ul << 20) /* of the bigger guests' files; what is not read is not touched */

static const char *const names[] = { "kpageflags", "kpagecount", "kpagecgroup" };
#define FILES (sizeof(names) / sizeof(names[0]))

static size_t read_all(int file, char *at)
{
	size_t total = 0;
	ssize_t length;

	while ((length = read(file, at + total, 1 << 20)) > 0)
		total += length;
	return total;
}

static void write_all(int disk, const char *at, size_t length, off_t where)
{
	length = (length + BLOCK - 1) & ~(BLOCK - 1);
	while (length) {
		ssize_t done = pwrite(disk, at, length, where);

		CHECK(done > 0);
		at += done;
		length -= done;
		where += done;
	}
}

int main(int argc, char **argv)
{
	char *buffers[FILES], *header;
	size_t lengths[FILES], used = 0;
	off_t offset = BLOCK;
	int disk;

	CHECK(argc == 2);
	disk = open(argv[1], O_WRONLY | O_DIRECT);
	CHECK(disk >= 0);
	header = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(header != MAP_FAILED);
	for (size_t i = 0; i < FILES; i++) {
		char path[64];
		int file;

		snprintf(path, sizeof(path), "/proc/%s", names[i]);
		file = open(path, O_RDONLY);
		buffers[i] = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(buffers[i] != MAP_FAILED);
		lengths[i] = file < 0 ? 0 : read_all(file, buffers[i]);
		used += snprintf(header + used, BLOCK - used, "%s %lld %zu\n", names[i],
				 (long long)offset, lengths[i]);
		offset += (lengths[i] + BLOCK - 1) & ~(BLOCK - 1);
	}
	write_all(disk, header, BLOCK, 0);
	offset = BLOCK;
	for (size_t i = 0; i < FILES; i++) {
		write_all(disk, buffers[i], lengths[i], offset);
		offset += (lengths[i] + BLOCK - 1) & ~(BLOCK - 1);
	}
	return 0;
}
