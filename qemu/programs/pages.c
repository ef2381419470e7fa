/*
 * Asleep, with some pages of every kind that user memory can have. For each it
 * prints the kind, the address, the page frame number and what the kernel says
 * of that page: /proc/kpageflags, /proc/kpagecount, and the inode of the
 * memory cgroup it is charged to. All of them are charged to one cgroup.
 *
 *   pages DIRECTORY-ON-A-DISK-FILESYSTEM CGROUP
 */
#include <sys/mman.h>
#include <sys/stat.h>

#include "planted.h"

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define PAGES 24
#define PATTERN 0x6b737475622d6b76ull
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#define ENTRY_PRESENT (1ull << 63)
#define ENTRY_SWAPPED (1ull << 62)

static int pagemap, flags_file, count_file, cgroup_file;

static uint64_t number_at(int file, uint64_t index)
{
	uint64_t value = 0;

	if (file >= 0)
		(void)!pread(file, &value, sizeof(value), (off_t)(index * 8));
	return value;
}

static uint64_t entry_of(const char *at)
{
	return number_at(pagemap, (uintptr_t)at / PAGE);
}

static uint64_t frame_of(const char *at)
{
	uint64_t entry = entry_of(at);

	return entry & ENTRY_PRESENT ? entry & ((1ull << 55) - 1) : 0;
}

static void report(const char *kind, const char *at)
{
	uint64_t entry = entry_of(at), frame = frame_of(at);

	if (entry & ENTRY_PRESENT)
		printf("page kind=%s virtual=%p pfn=0x%llx kpageflags=0x%llx kpagecount=%llu memcg=%llu\n",
		       kind, at, (unsigned long long)frame,
		       (unsigned long long)number_at(flags_file, frame),
		       (unsigned long long)number_at(count_file, frame),
		       (unsigned long long)number_at(cgroup_file, frame));
	else if (entry & ENTRY_SWAPPED)
		printf("swapped kind=%s virtual=%p type=%llu offset=%llu\n", kind, at,
		       (unsigned long long)(entry & 31),
		       (unsigned long long)(entry >> 5 & ((1ull << 50) - 1)));
	else
		printf("absent kind=%s virtual=%p\n", kind, at);
}

/* What will be reported when all is planted and has come to rest. */
static struct {
	const char *kind, *at;
	size_t pages;
} planted_pages[64];
static size_t planted_count;

static void remember(const char *kind, const char *at, size_t pages)
{
	CHECK(planted_count < sizeof(planted_pages) / sizeof(planted_pages[0]));
	planted_pages[planted_count].kind = kind;
	planted_pages[planted_count].at = at;
	planted_pages[planted_count++].pages = pages;
}

static void report_all(void)
{
	for (size_t i = 0; i < planted_count; i++)
		for (size_t page = 0; page < planted_pages[i].pages; page++)
			report(planted_pages[i].kind, planted_pages[i].at + page * PAGE);
}

/* Contents differ from page to page, or KSM would make them one. */
static void fill(char *at, size_t length)
{
	for (uint64_t *word = (void *)at; (char *)word < at + length; word++)
		*word = (uintptr_t)word ^ PATTERN;
}

static char *map(size_t length, int flags, int file)
{
	char *at = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, file, 0);

	return at == MAP_FAILED ? NULL : at;
}

static char *anonymous(size_t pages)
{
	char *at = map(pages * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	CHECK(at);
	madvise(at, pages * PAGE, MADV_NOHUGEPAGE);
	return at;
}

static char *filled(size_t pages)
{
	char *at = anonymous(pages);

	fill(at, pages * PAGE);
	return at;
}

/* Mapped by a child as well; before anything else is there, of which it would have a share too. */
static void plant_shared_with_child(void)
{
	char *shared = filled(PAGES);
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		name_thread("kstub-pages-kid");
		for (;;)
			pause();
	}
	printf("child=%d\n", pid);
	remember("anon-shared-with-child", shared, PAGES);
}

static void plant_anonymous(void)
{
	char *zero = anonymous(PAGES), *locked = filled(PAGES);

	remember("anon", filled(PAGES), PAGES);
	for (size_t i = 0; i < PAGES; i++)
		(void)*(volatile char *)(zero + i * PAGE);
	remember("zero", zero, PAGES);
	CHECK(mlock(locked, PAGES * PAGE) == 0);
	remember("mlocked", locked, PAGES);
}

/* The first page of a huge page, some of the following, and the last. */
static void remember_huge(const char *kind, const char *at)
{
	remember(kind, at, PAGES);
	remember(kind, at + HUGE - PAGE, 1);
}

static char *aligned(void)
{
	char *arena = map(2 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *at = (char *)(((uintptr_t)arena + HUGE - 1) & ~(HUGE - 1));

	CHECK(arena);
	madvise(at, HUGE, MADV_HUGEPAGE);
	return at;
}

static void plant_huge(void)
{
	char *transparent = aligned(), *zero = aligned();
	char *reserved = map(HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);

	fill(transparent, HUGE);
	remember_huge("anon-thp", transparent);
	(void)*(volatile char *)zero;
	remember_huge("zero-huge", zero);
	if (!reserved) {
		printf("skipped kind=hugetlb\n");
		return;
	}
	fill(reserved, HUGE);
	remember_huge("hugetlb", reserved);
}

static void plant_file(const char *kind, const char *directory, int clean)
{
	char path[256];
	int file;
	char *at;

	snprintf(path, sizeof(path), "%s/kstub-%s", directory, kind);
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
	CHECK(file >= 0 && ftruncate(file, PAGES * PAGE) == 0);
	at = map(PAGES * PAGE, MAP_SHARED, file);
	CHECK(at);
	fill(at, PAGES * PAGE);
	if (clean) {
		CHECK(msync(at, PAGES * PAGE, MS_SYNC) == 0 && fsync(file) == 0);
		for (size_t i = 0; i < PAGES; i++)
			(void)*(volatile char *)(at + i * PAGE);
	}
	printf("file kind=%s path=%s\n", kind, path);
	remember(kind, at, PAGES);
}

static void plant_shared_memory(void)
{
	int file = memfd_create("kstub-pages", 0);
	char *at;

	CHECK(file >= 0 && ftruncate(file, PAGES * PAGE) == 0);
	at = map(PAGES * PAGE, MAP_SHARED, file);
	CHECK(at);
	fill(at, PAGES * PAGE);
	remember("shmem", at, PAGES);
}

/* Swapped out for good; and swapped out and read again, which leaves the copy in swap. */
static void plant_swapped(void)
{
	char *out = filled(PAGES), *cached = filled(PAGES), *memory = NULL;
	int file = memfd_create("kstub-swapped", 0);

	madvise(out, PAGES * PAGE, MADV_PAGEOUT);
	remember("swapped", out, PAGES);

	madvise(cached, PAGES * PAGE, MADV_PAGEOUT);
	for (size_t i = 0; i < PAGES; i++)
		(void)*(volatile char *)(cached + i * PAGE);
	remember("swapcache", cached, PAGES);

	if (file >= 0 && ftruncate(file, PAGES * PAGE) == 0)
		memory = map(PAGES * PAGE, MAP_SHARED, file);
	if (memory) {
		fill(memory, PAGES * PAGE);
		madvise(memory, PAGES * PAGE, MADV_PAGEOUT);
		remember("shmem-swapped", memory, PAGES);
	}
}

static void write_to(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);

	if (file >= 0) {
		(void)!write(file, text, strlen(text));
		close(file);
	}
}

/* The flag for it is set for every anonymous page by some kernels (6.12), so frames are compared. */
static int merged(const char *one, const char *two)
{
	int count = 0;

	for (size_t i = 0; i < PAGES; i++)
		count += frame_of(one + i * PAGE) == frame_of(two + i * PAGE);
	return count == PAGES;
}

/* Two copies of each page, with the contents of the first; the kernel's thread makes them one. */
static void plant_merged(void)
{
	char *one = filled(PAGES), *two = anonymous(PAGES);

	memcpy(two, one, PAGES * PAGE);
	if (madvise(one, PAGES * PAGE, MADV_MERGEABLE) || madvise(two, PAGES * PAGE, MADV_MERGEABLE)) {
		printf("skipped kind=ksm\n");
		return;
	}
	write_to("/sys/kernel/mm/ksm/sleep_millisecs", "10");
	write_to("/sys/kernel/mm/ksm/pages_to_scan", "1000");
	write_to("/sys/kernel/mm/ksm/run", "1");
	for (int tries = 0; tries < 100 && !merged(one, two); tries++)
		usleep(50000);
	write_to("/sys/kernel/mm/ksm/run", "0");
	printf("ksm_merged=%d\n", merged(one, two));
	remember("ksm", one, PAGES);
	remember("ksm-copy", two, PAGES);
}

static void join(const char *cgroup)
{
	char path[256], text[16];
	struct stat facts;

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	snprintf(text, sizeof(text), "%d", getpid());
	write_to(path, text);
	if (stat(cgroup, &facts) == 0)
		printf("memcg=%llu\n", (unsigned long long)facts.st_ino);
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	pagemap = open("/proc/self/pagemap", O_RDONLY);
	flags_file = open("/proc/kpageflags", O_RDONLY);
	count_file = open("/proc/kpagecount", O_RDONLY);
	cgroup_file = open("/proc/kpagecgroup", O_RDONLY);
	CHECK(pagemap >= 0 && flags_file >= 0 && count_file >= 0);
	name_thread("kstub-pages");
	printf("pid=%d\ncomm=kstub-pages\npattern=0x%llx\n", getpid(), PATTERN);
	join(argv[2]);
	/* New pages wait for the LRU on lists of the CPU, which mlock() empties. */
	pin_to_cpu(0);
	plant_shared_with_child();
	plant_anonymous();
	plant_huge();
	plant_file("file-clean", argv[1], 1);
	plant_file("file-dirty", argv[1], 0);
	plant_shared_memory();
	plant_swapped();
	plant_merged();
	usleep(200000);
	CHECK(mlock(argv, 1) == 0 && munlock(argv, 1) == 0);
	report_all();
	planted();
	for (;;)
		pause();
}
