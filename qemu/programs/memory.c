/*
 * Asleep, with one mapping of every kind a page-table walk can meet. Every
 * region is printed with its contents rule; every page of it with the
 * physical address the kernel itself gives (/proc/self/pagemap).
 *
 * contents=pattern: each aligned 8 bytes hold their own address XOR PATTERN.
 */
#include <sys/mman.h>

#include "planted.h"

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define PATTERN 0x6b737475622d6b76ull

static void *map(void *hint, size_t length, int flags)
{
	void *at = mmap(hint, length, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static void fill(void *at, size_t length)
{
	for (uint64_t *word = at; (char *)word < (char *)at + length; word++)
		*word = (uintptr_t)word ^ PATTERN;
}

static void report(const char *name, void *at, size_t length, const char *protection,
		   const char *contents)
{
	printf("region name=%s start=%p length=0x%zx protection=%s contents=%s\n", name, at,
	       length, protection, contents);
	/* Of a big region the first pages and the last say enough. */
	for (size_t offset = 0; offset < length; offset += PAGE)
		if (offset < 8 * PAGE || offset + PAGE == length)
			printf("page name=%s virtual=%p physical=0x%llx\n", name, (char *)at + offset,
			       (unsigned long long)physical_address((char *)at + offset));
}

static void plant_string(void)
{
	char *at = map(NULL, PAGE, 0);

	snprintf(at, PAGE, "kstub was here: a string in a user page of pid %d", getpid());
	report("string", at, PAGE, "rw-", "text");
	printf("text name=string value=\"%s\"\n", at);
}

static void plant_small_pages(void)
{
	char *pattern = map(NULL, 4 * PAGE, 0);
	char *none = map(NULL, 2 * PAGE, 0);
	char *untouched = map(NULL, 4 * PAGE, 0);
	char *zero = map(NULL, PAGE, 0);

	fill(pattern, 4 * PAGE);
	report("pattern", pattern, 4 * PAGE, "rw-", "pattern");

	/* The page stays in memory; only the present bit of its entry goes. */
	fill(none, PAGE);
	CHECK(mprotect(none, PAGE, PROT_NONE) == 0);
	report("protnone", none, PAGE, "---", "pattern");

	report("untouched", untouched, 4 * PAGE, "rw-", "absent");

	/* A read fault of anonymous memory maps the shared zero page. */
	(void)*(volatile char *)zero;
	report("zeropage", zero, PAGE, "rw-", "zero");
}

static void plant_shared_memory(void)
{
	int file = memfd_create("kstub-shared", 0);
	void *at;

	CHECK(file >= 0 && ftruncate(file, 2 * PAGE) == 0);
	at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	CHECK(at != MAP_FAILED);
	fill(at, 2 * PAGE);
	report("shared", at, 2 * PAGE, "rw-", "pattern");
}

static void plant_huge_pages(void)
{
	char *arena = map(NULL, 2 * HUGE, 0);
	char *aligned = (char *)(((uintptr_t)arena + HUGE - 1) & ~(HUGE - 1));
	char *reserved;

	madvise(aligned, HUGE, MADV_HUGEPAGE);
	fill(aligned, HUGE);
	report("transparent-huge", aligned, HUGE, "rw-", "pattern");

	reserved = map(NULL, HUGE, MAP_HUGETLB);
	if (!reserved) {
		printf("skipped name=hugetlb\n");
		return;
	}
	fill(reserved, HUGE);
	report("hugetlb", reserved, HUGE, "rw-", "pattern");
}

/* Only a kernel that uses five levels honours a hint above 47 bits. */
static void plant_high_page(void)
{
	char *high = map((void *)0x00ab000000000000ul, PAGE, 0);
	int five = (uintptr_t)high >> 47 != 0;

	printf("page_table_levels=%d\n", five ? 5 : 4);
	if (five) {
		fill(high, PAGE);
		report("five-level", high, PAGE, "rw-", "pattern");
	}
}

int main(void)
{
	name_thread("kstub-memory");
	printf("pid=%d\ncomm=kstub-memory\npattern=0x%llx\n", getpid(), PATTERN);
	plant_string();
	plant_small_pages();
	plant_shared_memory();
	plant_huge_pages();
	plant_high_page();
	planted();
	for (;;)
		pause();
}
